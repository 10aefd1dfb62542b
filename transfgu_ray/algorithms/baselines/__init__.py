"""What the method is compared with, on the same frozen encoder."""
