"""Jobs: submits, resumes and watches runs, and collects their results."""
