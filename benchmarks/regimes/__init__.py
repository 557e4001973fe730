"""Where removing gradient conflict, or balancing the losses, beats the plain sum (digits)."""
