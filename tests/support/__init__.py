"""What tests share: photos, servers, processes of the job, runs that were never trained."""
