"""What several tests share: small models with statistics in every slot, and corrupted copies of artifacts."""
