document.getElementById("playground").textContent = "lorakit";
