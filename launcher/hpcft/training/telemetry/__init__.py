"""Measures progress and peak memory while a run trains."""
