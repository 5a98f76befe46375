"""The gateway: accepts requests, records them, decides where they run, and answers.

requests.py    what may be asked                ledger.py      what was accepted, on disk
registry.py    who is there                     placement.py   programs x nodes that could serve a job
jobs.py        one job's life                   dispatcher.py  places jobs, hears of them, recovers them
checkpoints.py latents to go on from            service.py     sockets, clocks, HTTP: the process
retention.py   what is kept, and how long       http.py        the HTTP side; its docstring lists the rest
"""
