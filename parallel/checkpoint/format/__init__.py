"""DCP's extension points for our files (hope/stored): raw storage, and the planners between boxes and DCP."""
