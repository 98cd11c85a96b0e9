"""The files of a checkpoint: manifest, folder names and renames, raw storage, and the planners between them and DCP."""
