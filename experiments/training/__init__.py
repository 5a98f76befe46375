"""Training of the embedded families: VAE, text encoder, judge, and the members, on scenes rendered here."""
