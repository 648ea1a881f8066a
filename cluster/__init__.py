"""From one YAML file to a running cluster: placement, Ray actors, command line, and the relay as one Python object."""
