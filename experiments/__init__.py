"""What answers a question with a figure: training, demo, evaluation, benchmark."""
