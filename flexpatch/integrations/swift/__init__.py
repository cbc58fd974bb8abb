"""Plugin of ms-swift, a file of its own folder: ms-swift puts the folder of a plugin first on ``sys.path``."""
