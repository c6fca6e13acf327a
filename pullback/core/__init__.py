"""The backward core: sites, problems, rules and the estimator. Imports torch and the standard library only."""
