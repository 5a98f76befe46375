"""The service as a discrete-event simulation: measured step times and scores below, queues, batches and links on top.

    world = World.of(read_world(path))              nodes, links, programs, measured costs
    simulation = Simulation(world, scores, reward)
    rows = simulation.run(policy, requests, seed)   what the policy chose, with its probability, and what came of it

Same arguments, same rows. Knows no torch.
"""
