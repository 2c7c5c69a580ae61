"""From one's own models and questions to policies: `asking` the models, `collect` grades their
answers and keeps them, `learn` makes policies of them and measures these."""
