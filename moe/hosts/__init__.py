"""Engines that train the layer, one a file, each imported only when it is used."""
