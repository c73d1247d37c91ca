"""Shared by the other rooms: command lines, text, full disks, file systems, processes."""
