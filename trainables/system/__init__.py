"""What the other rooms share: command lines, text, full disks and file systems."""
