"""Example jobs: data of the package, which `modxfer init` lists and copies."""
