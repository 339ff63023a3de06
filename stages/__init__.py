"""The DVC stages: thin scripts that call the library with settings from params.yaml. Run them with -m."""
