"""The latent cache: intermediate latents of finished requests, from which a similar prompt's may start."""
