"""One file a framework, each for one line of the framework's configuration. The library imports none of them."""
