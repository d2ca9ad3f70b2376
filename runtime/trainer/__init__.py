"""Fine-tuning jobs in the serving process: recipes, data, training in slices, jobs, and adapter versions."""
