"""What all commands share: messages, interrupts and the reporting of errors."""
