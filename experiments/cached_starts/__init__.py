"""What a start from another prompt's latent is worth, by how alike the prompts are and how many steps it skips.

pairs.py    prompts and sources over the whole range of similarity      report.py      tables, and the Markdown
draw.py     pictures of them, and their rows                            calibrate.py   thresholds from validation rows
"""
