#!/usr/bin/env bash
# Orthanc with DICOMweb, DCMTK and dicom3tools for the tests of hospital interfaces, from Debian's packages, where this is root.
set -euo pipefail
missing=()
for pair in Orthanc:orthanc storescu:dcmtk dciodvfy:dicom3tools; do
  command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
[ -e /usr/share/orthanc/plugins/libOrthancDicomWeb.so ] || missing+=(orthanc-dicomweb)
[ ${#missing[@]} = 0 ] && exit 0
command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] || { echo "${missing[*]} are not installed, and only root may install them." >&2; exit 2; }
export DEBIAN_FRONTEND=noninteractive
install() { timeout 600 apt-get -o Acquire::http::Timeout=20 install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1; }
install || { apt-get -o Acquire::http::Timeout=20 update -qq >/dev/null 2>&1 && install; } \
  || { echo "The packages ${missing[*]} cannot be installed." >&2; exit 2; }
