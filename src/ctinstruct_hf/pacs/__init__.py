"""Scans from and results to the archives of hospitals: DICOMweb, DIMSE, and a service that watches for new studies."""
