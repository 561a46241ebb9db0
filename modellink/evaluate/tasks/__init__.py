"""The benchmark tasks that come with the package: one YAML row each, and their data."""
