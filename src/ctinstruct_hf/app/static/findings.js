// Probabilities, and the table of findings, whose rows lead to the picture and to the report.
"use strict";

async function diagnose() {
  const result = await work({ kind: "diagnose", diseases: $("list").value });
  if (result) drawBars(result.diagnosis);
}

function drawBars(diagnosis) {
  const rows = Object.entries(diagnosis).sort((one, other) => other[1] - one[1]);
  $("bars").replaceChildren(
    ...rows.map(([name, value]) => {
      const row = make("div", undefined, { class: "bar", "data-finding": anchor("bar", name) });
      const meter = make("meter", undefined, { min: 0, max: 1, value, "aria-label": `${name}: ${Math.round(100 * value)} %` });
      const title = make("span", name);
      lead(title, name, "row");
      row.append(title, meter, make("span", value.toFixed(2)));
      return row;
    }),
  );
}

async function compare() {
  const result = await work({ kind: "findings" });
  if (!result) return;
  await drawMasks();
  showFindings(result);
  showReport(await call("GET", `api/studies/${page.study.study}/results`));
}

function showFindings({ findings, fitness }) {
  if (fitness) $("fitness").textContent = `This scan is ${fitness.state === "unknown" ? "not compared: the model has no calibration" : fitness.state}. ${fitness.unusual.join("; ")}`;
  drawTable(findings);
}

const anchor = (part, name) => `${part}-${name.replace(/\W+/g, "-")}`;

function lead(element, name, target) {
  // To the slice where the finding is largest, and to what else is said of it.
  element.classList.add("grounded");
  element.tabIndex = 0;
  element.setAttribute("role", "button");
  const act = () => {
    const mask = page.masks.get(name);
    if (mask && mask.measured.voxels) goTo(mask);
    for (const other of document.querySelectorAll(".shown")) other.classList.remove("shown");
    for (const one of document.querySelectorAll(`[data-finding="${anchor(target, name)}"]`)) {
      const panel = one.closest("[role=tabpanel]");
      if (panel && panel.hidden && !(mask && mask.measured.voxels)) showTab(panel.id.slice("panel-".length));
      one.classList.add("shown");
      one.scrollIntoView({ block: "nearest" });
    }
  };
  element.addEventListener("click", act);
  element.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") act();
  });
}

function drawTable(rows) {
  const fine = ["consistent", "unchecked"];
  const table = make("table");
  const head = make("tr");
  for (const word of ["Finding, reader", "Model", "Mask"]) head.append(make("th", word, { scope: "col" }));
  table.append(head);
  const wrong = (row) => !fine.includes(row.agreement);
  const sorted = Object.entries(rows).sort((one, other) => wrong(other[1]) - wrong(one[1]) || other[1].probability - one[1].probability);
  for (const [name, row] of sorted) {
    const line = make("tr", undefined, { "data-finding": anchor("row", name) });
    if (wrong(row)) line.className = "contradiction";
    const title = make("th", undefined, { scope: "row" });
    const link = make("span", name);
    lead(link, name, "sentence");
    const named = make("div", undefined, { class: "named" });
    named.append(link, verdict(name));
    title.append(named);
    const says = make("td");
    const probability = row.probability === null ? "–" : row.probability.toFixed(2);
    says.append(make("div", `probability ${probability}; report: ${row.report}; asked: ${row.answer || "–"}`));
    says.append(make("strong", [(wrong(row) ? "contradiction: " : "") + row.agreement, ...row.remarks].join("; ")));
    const mask = !row.mask ? "–" : row.mask.voxels ? `${row.mask.volume_ml.toFixed(1)} ml, ${Math.round(row.mask.diameter_mm)} × ${Math.round(row.mask.perpendicular_mm)} mm${row.mask.organ ? `, ${row.mask.organ}` : ""}` : "empty";
    line.append(title, says, make("td", mask));
    table.append(line);
  }
  $("table").replaceChildren(table);
}

function verdict(name) {
  // What the reader says of a finding.
  const select = make("select", undefined, { "aria-label": `${name}, by the reader` });
  for (const [value, words] of [["", "–"], ["true", "present"], ["false", "absent"]]) select.append(make("option", words, { value }));
  select.value = String(page.labels[name] ?? "");
  select.addEventListener("change", async () => {
    try {
      const labels = { [name]: select.value ? select.value === "true" : null };
      page.labels = (await call("PUT", `api/studies/${page.study.study}/review`, { labels })).labels;
    } catch (error) {
      complain(error);
    }
  });
  return select;
}

function startFindings() {
  for (const name of Object.keys(page.model.disease_lists)) $("list").append(make("option", name.replaceAll("_", " "), { value: name }));
  $("diagnose").addEventListener("click", guarded(diagnose));
  $("compare").addEventListener("click", guarded(compare));
}
