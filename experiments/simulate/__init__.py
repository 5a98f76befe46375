"""The service as a discrete-event simulation: measured step times and scores below, queues, batches and links on top.

    scores = read_scores(store)                          program x prompt x seed
    world = World(read_world(path), scores.programs)     nodes, links, measured costs
    simulation = Simulation(world, scores, reward)
    rows = simulation.run(policy, requests, seed)        what it chose, with its probability, and what came of it

Same arguments, same rows. Knows no torch.
"""
