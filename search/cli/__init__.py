"""What all commands share: messages, interrupts, errors, and numbers as people read them."""
