"""The tests. A package, so that `from tests.helpers import ...` never finds another project's."""
