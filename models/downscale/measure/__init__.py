"""What a pool's models and policies answer, the laws that they follow, and the report."""
