"""Serving under load, compared: systems that choose levels, on the same nodes, requests and deadlines, simulated.

    case = read_case(config)                 nodes, levels, measured quality, traces
    outcome = serve(case, system, asked)     one run: what each request got and when
    python -m experiments.load levels | ship | capacity | tune | table | bench
    python -m experiments.load service | overload        real processes, against the simulation and beyond what they can bear

Nodes, batches and links are those of `experiments.simulate`; quality is what the outcome store measured, never predicted.
"""
