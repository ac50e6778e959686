// "Open from PACS": studies of a search, their series, and one of them opened. What app.js has is used once it is loaded.
"use strict";

async function fromArchive(step, action) {
  calm();
  $("choose").hidden = true;
  $("opening").textContent = step;
  await withoutButtons([...$("pacs").querySelectorAll("button")], action);
  $("opening").textContent = "";
}

const images = (one) => (one.images === null ? "" : `${one.images} images`);
const listed = (...words) => words.filter(Boolean).join(", ");

function searchArchive(event) {
  event.preventDefault();
  const words = { from: $("pacs-from").value, to: $("pacs-to").value };
  if ($("by-patient").open) words.patient = $("pacs-patient").value; // only where it is asked for
  return fromArchive("Searching …", async () => {
    $("pacs-studies").replaceChildren();
    const { studies } = await call("POST", "api/pacs/studies", words);
    if (!studies.length) throw new Error("No CT study was found.");
    for (const study of studies) {
      const row = make("li");
      const button = make("button", listed(study.date, study.description || "without description", images(study)), { type: "button" });
      button.addEventListener("click", () => fromArchive("Listing the series …", () => listArchived(study.uid, row)));
      row.append(button);
      $("pacs-studies").append(row);
    }
  });
}

async function listArchived(study, row) {
  const { series } = await call("POST", "api/pacs/series", { study });
  const list = make("ul", undefined, { "aria-label": "CT series of the study" });
  for (const one of series) {
    const number = one.number === null ? "" : `series ${one.number}`;
    const words = listed(number, one.description || "without description", one.body_part, images(one));
    const item = make("li");
    const button = make("button", `Open ${words}`, { type: "button" });
    button.addEventListener("click", () =>
      opened("Fetching the series …", () => openUpload({ pacs: study, series: one.uid })),
    );
    item.append(button);
    list.append(item);
  }
  for (const other of $("pacs-studies").querySelectorAll("ul")) other.remove();
  row.append(list);
}
