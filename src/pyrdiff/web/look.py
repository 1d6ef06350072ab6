"""The page's theme and style sheet. Fonts are the system's own."""

import gradio as gr

THEME = gr.themes.Default(
    primary_hue="blue",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
    radius_size="sm",
)
CSS = """
.gradio-container {width: 100% !important; max-width: 1320px !important; margin: 0 auto !important}
.intro h1 {font-size: 1.6rem; font-weight: 600; margin: .2rem 0}
.intro p, .muted {color: var(--body-text-color-subdued); margin: 0}
.status {min-height: 1.6rem}
.status progress {display: block; width: 100%; height: .4rem; appearance: none; border: 0}
.status progress, .status progress::-webkit-progress-bar {border-radius: .2rem; background: var(--neutral-200)}
.status progress::-webkit-progress-value {border-radius: .2rem; background: var(--primary-500)}
.status progress::-moz-progress-bar {border-radius: .2rem; background: var(--primary-500)}
.dark .status progress, .dark .status progress::-webkit-progress-bar {background: var(--neutral-700)}
.status progress + div {padding-top: .4rem; font-variant-numeric: tabular-nums}
.status.error {border-left: 3px solid #dc2626; padding: .5rem .8rem; background: #dc262614}
.pyr-sharp img {image-rendering: pixelated}
.pyr-rows {display: flex; flex-direction: column; gap: .8rem}
.pyr-row {display: flex; gap: 1rem; align-items: flex-start}
.pyr-row > .cost {flex: none; min-width: 7rem; font-variant-numeric: tabular-nums; line-height: 1.4; font-size: .85rem}
.pyr-images {display: flex; flex-wrap: wrap; gap: .4rem}
.pyr-images img {height: 64px; width: auto; border-radius: 3px; background: #8882}
.pyr-preview img {height: 128px}
.pyr-strip {display: grid; gap: .4rem; align-items: end; overflow-x: auto}
.pyr-strip span {color: var(--body-text-color-subdued); font-size: .85rem; white-space: nowrap}
.pyr-strip img {width: 100%; height: auto; border-radius: 3px}
.sharp {image-rendering: pixelated}
.pyr-verdict p {margin: .2rem 0 .5rem}
.pyr-verdict table {border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0}
.pyr-verdict th, .pyr-verdict td {text-align: right; padding: .15rem .9rem .15rem 0; font-weight: 400}
.pyr-verdict th:first-child, .pyr-verdict td:first-child {text-align: left; font-weight: 600}
.pyr-seed {flex-wrap: nowrap !important}
.pyr-dice {justify-content: space-evenly; gap: .2rem !important}
.pyr-gallery .grid-wrap {max-height: none !important}
.pyr-few .grid-container {max-width: 720px; margin: 0 auto}
@media (max-width: 760px) {
  .pyr-results {order: -1}
  .pyr-head {flex-direction: column}
  .pyr-go {position: sticky; bottom: 0; z-index: 5; padding: .4rem 0; background: var(--body-background-fill)}
  .pyr-row {flex-direction: column; gap: .3rem}
  .intro h1 {font-size: 1.25rem}
  .intro p {font-size: .8rem}
}
"""
