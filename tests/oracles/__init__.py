"""Independent formulations and public implementations that the tests compare this library with."""
