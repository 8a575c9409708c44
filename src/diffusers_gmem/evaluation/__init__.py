from .frechet_distance import FeatureStatistics, frechet_distance


__all__ = ["FeatureStatistics", "frechet_distance"]
