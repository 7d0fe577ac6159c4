"""`rollmesh up`: the whole mesh on one machine.

`main` calls the other modules in order. `preflight` refuses a mesh that cannot work, before any service is started.
`processes` owns the service processes. `progress` shows one line a second. `report` turns the run folder into a page.
"""
