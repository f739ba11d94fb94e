"""The version of this package, for its own files: an import of the package itself would be a circle."""

__all__ = ["__version__"]

__version__ = "0.2.0"
