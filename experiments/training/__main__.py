from experiments.training.cli import main

main()
