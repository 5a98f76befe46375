"""The gateway: accepts requests, records them, decides where they run, and answers.

planner.py     what may serve a request         ledger.py      what was accepted, on disk
registry.py    who is there                     placement.py   programs x nodes that could serve a job
jobs.py        one job's life                   dispatcher.py  takes jobs in, hears of them, recovers and ends them
placer.py      decides where a job goes         assignments.py what each of its nodes is told
timeline.py    what happened to jobs            views.py       jobs as their tenant sees them
reports.py     what is told of one that ended   service.py     sockets, clocks, HTTP: the process
retention.py   what is kept, and how long       http.py        the HTTP side; its docstring lists the rest
"""
