"""The messages and figures of a process.

`logs` sets up logging. `output` keeps a process alive whose terminal goes away. `crash` describes unexpected
exceptions. `json_lines` is a file of JSON objects. `details` holds metrics whose names come from the data.
"""
