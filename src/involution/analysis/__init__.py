"""What involution costs, measured on this machine."""
