"""What a selection may take: candidates, their facts, predicates."""
