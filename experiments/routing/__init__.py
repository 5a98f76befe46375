"""What the router learns from and is compared on."""
