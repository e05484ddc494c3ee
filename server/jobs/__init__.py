"""Long work on adapters: queued, one at a time, in processes of its own."""
