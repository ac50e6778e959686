// A mask corrected where it is seen, by NiiVue's pen; it is saved beside the model's as "edited".
"use strict";

async function startEdit(mask) {
  if (page.editing) stopEditing();
  const answer = await fetch(mask.url);
  if (!answer.ok) throw new Error("The mask did not arrive.");
  const file = await new Response(answer.body.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  const viewer = page.viewer;
  const value = slot(mask.measured.number);
  const labels = labelsOf(file, viewer.volumes[0]);
  for (let index = 0; index < labels.length; index++) if (labels[index]) labels[index] = value;
  mask.shown = true;
  page.editing = { mask, value };
  setDrawing(labels);
  paintMasks();
  viewer.drawClearAllUndoBitmaps();
  viewer.setDrawingEnabled(true);
  viewer.drawAddUndoBitmap();
  setPen();
  $("edited").textContent = mask.name;
  $("editing").hidden = false;
  $("tool").value = "";
  $("canvas").focus();
}

function setPen() {
  const pen = document.querySelector("input[name=pen]:checked").value;
  page.viewer.opts.penSize = Number($("pen-size").value) || 1;
  page.viewer.setPenValue(pen === "eraser" ? 0 : page.editing.value, pen === "fill");
}

function stopEditing() {
  page.editing = null;
  page.viewer.setDrawingEnabled(false);
  page.viewer.drawClearAllUndoBitmaps();
  $("editing").hidden = true;
}

async function keepEdited() {
  const { mask } = page.editing;
  const voxels = fileOrder(page.viewer.drawBitmap, page.viewer.volumes[0]);
  const body = await new Response(new Blob([voxels]).stream().pipeThrough(new CompressionStream("deflate"))).arrayBuffer();
  await send(`api/studies/${page.study.study}/masks/${encodeURIComponent(mask.name)}/edited`, new Blob([body]), () => {});
  stopEditing();
  page.masks.delete(mask.name); // shown or not as if it were new
  await drawMasks();
}

function startEditing() {
  for (const pen of document.querySelectorAll("input[name=pen]")) pen.addEventListener("change", setPen);
  $("pen-size").addEventListener("change", setPen);
  $("undo").addEventListener("click", () => page.viewer.drawUndo());
  $("keep").addEventListener("click", () => withoutButtons([$("keep")], keepEdited));
  $("discard").addEventListener("click", () => {
    stopEditing();
    drawMasks().catch(complain);
  });
}
