// A webhook receiver with nothing but Go's standard library. Not run by CI, unlike the others.
//
//	TIDEMILL_WEBHOOK_SECRET=whsec_... go run receiver.go
package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

func key(secret string) []byte {
	if rest, found := strings.CutPrefix(secret, "whsec_"); found {
		if key, err := base64.StdEncoding.DecodeString(rest); err == nil {
			return key
		}
	}
	return []byte(secret)
}

// verify fails unless the request is the sender's and fresh.
func verify(key []byte, header http.Header, body []byte, now time.Time) error {
	timestamp := header.Get("webhook-timestamp")
	seconds, err := strconv.ParseUint(timestamp, 10, 62)
	if err != nil {
		return errors.New("the timestamp is no number")
	}
	if age := now.Unix() - int64(seconds); age > 300 || age < -60 {
		return errors.New("the timestamp is too old or too new")
	}
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%s.", header.Get("webhook-id"), timestamp)
	mac.Write(body)
	right := mac.Sum(nil)
	for _, entry := range strings.Split(header.Get("webhook-signature"), " ") {
		encoded, found := strings.CutPrefix(entry, "v1,")
		given, err := base64.StdEncoding.DecodeString(encoded)
		if found && err == nil && hmac.Equal(given, right) {
			return nil
		}
	}
	return errors.New("no signature matches")
}

func main() {
	key := key(os.Getenv("TIDEMILL_WEBHOOK_SECRET"))
	var seen sync.Map // in earnest: a table with a unique column
	http.HandleFunc("POST /", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20)) // the bytes, before any parsing
		if err == nil {
			err = verify(key, r.Header, body, time.Now())
		}
		if err != nil {
			log.Println("refused:", err)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if _, again := seen.LoadOrStore(r.Header.Get("webhook-id"), true); !again {
			var event struct{ Type, ID string }
			_ = json.Unmarshal(body, &event)
			log.Println(event.Type, event.ID)
		}
		w.WriteHeader(http.StatusNoContent)
	})
	log.Fatal(http.ListenAndServe("127.0.0.1:9000", nil))
}
