"""From one's own models and questions to policies: `asking` the models, `collect` has their answers
graded and keeps them, `learn` makes policies of them, and `report` tells what these are worth."""
