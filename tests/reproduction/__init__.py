"""The paper's experiments: trained (runs), evaluated under each policy (policies), and compared (tables)."""
