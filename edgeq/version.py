"""The version of edgeq, in one place: the build, the command line and every manifest read it here (L0)."""

__version__ = "0.1.0"
