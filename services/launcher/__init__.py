"""`rollmesh up`: the whole mesh on one machine.

`preflight` refuses what cannot work before anything is started, `processes` owns the service processes, `progress`
shows one line a second, `report` turns the run folder into a page, `main` puts them in order.
"""
